"""Networks that rewards and metrics share: CLIP."""
