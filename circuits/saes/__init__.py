"""One SAE per site: their training, what each leaves out, and the folder that holds them."""
