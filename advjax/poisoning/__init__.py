"""Model poisoning: what malicious clients send in place of their updates."""

from advjax.poisoning.attackers import Context, Poisoning

__all__ = ["Context", "Poisoning"]
