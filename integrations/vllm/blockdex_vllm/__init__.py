"""MiniMax-M3's indexer in vLLM by the kernels of blockdex. vLLM loads `plugin.register` by itself."""
