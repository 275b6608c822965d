"""How what others wrote is shown: as text."""
