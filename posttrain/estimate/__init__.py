"""Before training: does it fit, and how long does it take?

architecture   the sizes of a model, from its config.json or GGUF header
trainable      how many parameters each method trains
activations    what a forward pass keeps for the backward pass
memory         all that lies in a device's memory at once
speed          operations a token, and how many a second
device         what this machine has
stage          one training stage of a recipe: memory, time, and what to change if it does not fit

Nothing in here imports torch: `posttrain plan` asks for all of it and must answer at once.
"""
