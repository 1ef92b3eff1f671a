"""The autoencoder as a model: build and load it, encode to moments, scale latents, train and measure it."""
