"""From a manifest row to the exact tokens that the model reads.

In the order in which a script passes through:

    row         a table row as plain values, and its errors
    script      the schema, what follows from it alone, and its content hash
    voices      recordings, transcripts and described profiles; their checks and codes
    spoken      optional: numbers, dates, money and abbreviations as words; a lexicon of respellings
    normalize   text in the form of the training data
    chunking    the chunks that are generated one after the other, and the exact pauses between them
    references  the voices of a script as messages
    budget      expected and maximum frames of a text
    plan        all of the above for one script
    prompt      ChatML: text, token ids, and the codes for the placeholders

`languages` has what the others need about languages and writing systems. Nothing here loads the model.
"""
