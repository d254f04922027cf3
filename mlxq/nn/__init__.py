"""Packed layers for each framework: mlxq.nn.mlx."""
