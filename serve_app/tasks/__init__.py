"""What a task does before and after its model, without torch: decode and prepare the input, read the output.

One module for each task. Routers and workers share them; the store and the models know nothing of the formats of users.
"""
