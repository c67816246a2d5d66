"""Unconditional images: a U-Net in pixel space, any folder of pictures, set distances."""
