"""Generative retrieval over very long user histories: TorchRec tables, a hybrid SA/GBLA encoder, a semantic-ID decoder."""
