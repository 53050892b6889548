"""Segmentation: a class for every pixel or voxel, with networks, loss and inference of MONAI."""
