"""Classification from a folder of images too large for memory, read as it is trained on: ImageNet."""
