"""Side by side with stock llama.cpp: models to measure on, the stock side, and the measuring."""
