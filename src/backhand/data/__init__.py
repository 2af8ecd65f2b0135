"""From rows to packed batches: readers, forms, chat templates, loss masks, order."""
