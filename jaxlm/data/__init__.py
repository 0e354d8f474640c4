"""From files of text to batches: sources, formats, a memory-mapped cache of tokens, packing, and the order of training.

rows = open_rows("train.jsonl")                              # sources: random access, bad rows located
cache = prepare(PrepareConfig(source=..., tokenizer=...), out)   # formats: rows -> tokens and a loss mask, once
batches = Batches(cache, batch_size=8, seq_len=1024, seed=0)     # batches[step]: a pure function of (seed, step)
"""
