"""From text to micro-batches: documents, tokenizer, indexed datasets, sampling.

    text.iter_documents -> tokenizer.train_tokenizer / load_tokenizer -> prepare.prepare
        -> <prefix>_{train,valid}.{bin,idx}, <prefix>.json
        -> dataset.build_train_valid_datasets (megatron.core GPTDataset)
        -> dataset.MicroBatchIterator

Importing this package imports neither megatron nor transformers.
"""
