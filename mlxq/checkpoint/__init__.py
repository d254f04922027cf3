"""Names on disk: one reader for each foreign format, one writer of MLX's."""
