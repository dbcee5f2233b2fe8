"""The durable, ordered, idempotent log of operations and their results, and the catalogue of what exists."""

from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.order import ModelLog, Turn

__all__ = ["Ledger", "ModelLog", "Turn"]
