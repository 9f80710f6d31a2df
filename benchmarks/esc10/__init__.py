"""Does distilling from stored views beat learning from labels? An experiment on the 400 recordings of ESC-10."""
