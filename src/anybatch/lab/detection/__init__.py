"""Detection: COCO-format data read strictly, and scenes to train on that need no download."""
