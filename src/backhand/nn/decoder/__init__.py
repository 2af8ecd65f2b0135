"""The decoder engine: a family as data, the block, the forward and the backward pass by hand."""
