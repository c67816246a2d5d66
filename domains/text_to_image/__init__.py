"""Text-to-image generation: captioned pictures, pipelines and rewards."""
