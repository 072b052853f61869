"""Which method to train with, and what to begin with: from data, goals and hardware.

situation   what the adviser is told
gather      a situation from the command line, a recipe and this machine
reading     what a recipe says of its data and its model
memory      which method fits, by `posttrain.estimate`
rules.yaml  what it knows, with sources
conditions  the language of the rules' conditions and sentences
rules       what a rule is made of
engine      the rules that hold, merged by priority
drafting    a recipe from advice
review      where a given recipe differs
"""
