"""Stages of the early-fusion model: image_tokenizer, pretrain_moma, train_causal_routers, upcycle."""
