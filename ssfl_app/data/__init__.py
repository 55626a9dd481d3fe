"""What clients train on: readers, caches and summaries of data sets."""
