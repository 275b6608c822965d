"""What each operation does to the axes that carry units: one rule an operation, registered by its ATen name."""
