"""From text to stored activations: sources of tokens, the harvest, the store on disk, the shuffle buffer."""
