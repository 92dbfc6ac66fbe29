"""Federated training under attack: partitions of the data, and a simulator."""

__all__: list[str] = []
