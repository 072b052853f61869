"""Which method to train with, and what to begin with: from data, goals and hardware."""
