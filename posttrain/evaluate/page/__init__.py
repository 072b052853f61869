"""What `report.html` is made of: the numbers it shows, its drawings, its texts and its template."""
