"""Campaigns against recordings and artifacts: kills, faults, damage, strangers' files. See docs/reliability.md."""
