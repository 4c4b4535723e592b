"""Sentences as vectors, by small encoders on onnxruntime: built from published weights, or any other ONNX file."""

from .session import DEFAULT_ENCODER, SentenceEncoder

__all__ = ["DEFAULT_ENCODER", "SentenceEncoder"]
