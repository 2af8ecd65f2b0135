"""Training data: row formats, chat templates, loss masks, shuffling and packing into batches."""
