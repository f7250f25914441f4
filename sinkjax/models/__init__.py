"""What a model computes: configuration, decoder, positions, families."""

from sinkjax.models.config import Config
from sinkjax.models.decoder import Decoder
from sinkjax.models.positions import RopeScaling, Rotary

__all__ = ["Config", "Decoder", "RopeScaling", "Rotary"]
