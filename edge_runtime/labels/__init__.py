"""Label packs: text classifiers trained and run on a small device."""
