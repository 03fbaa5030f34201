"""Proofs that try hard to break the engine; nothing imports the lab."""
