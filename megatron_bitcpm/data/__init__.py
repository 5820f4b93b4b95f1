"""From text to micro-batches: documents, tokenizer, indexed datasets, sampling.

    text.iter_documents -> tokenizer.train_tokenizer / load_tokenizer -> prepare.prepare
        -> <prefix>_{train,valid}.{bin,idx}, <prefix>.json
        -> dataset.build_train_dataset, build_valid_datasets
             sets         which sets the configuration names, checked; fingerprints
             index_cache  one shuffled epoch of each, stock megatron.core GPTDataset
             blend        merged by weight
             documents    positions, starts and loss masks
        -> dataset.MicroBatchIterator

Importing this package imports neither megatron nor transformers.
"""
