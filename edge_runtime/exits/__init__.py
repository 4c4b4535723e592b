"""Exit packs: heads at layer boundaries, signals, and thresholds with certificates."""
