"""From a manifest row to the exact tokens that the model sees.

In the order in which a script passes through:

    row         a table's row as plain values, and its faults in words
    script      the schema, what follows from it alone, and its content hash
    voices      recordings, transcripts and described profiles; their checks and their codes
    spoken      on request: numbers, dates, money and abbreviations as words; a lexicon of respellings
    normalize   text as the checkpoint was trained on it
    chunking    pieces that the model speaks one after the other, and the exact pauses between them
    references  the voices of one script, as messages in front of everything
    budget      how many frames a piece may take
    plan        all of the above for one script: what will be said, by whom, with what in front of it
    prompt      ChatML: text, token ids, and the codes that fill the placeholders

`languages` is what the others know about writing systems. Nothing here loads the model.
"""
