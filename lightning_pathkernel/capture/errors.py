"""What capturing raises."""

__all__ = ["CaptureError"]


class CaptureError(RuntimeError):
    """Per-example gradients cannot be taken from this model or this step."""
