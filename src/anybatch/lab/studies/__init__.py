"""Studies: files that say which runs answer a question, and what comes of them as a page with a figure.

title = "Learning rate"
question = "Does a method need another learning rate than BatchNorm?"
methods = ["bn", "cbn"]         # as anybatch compare takes them; "all" is the whole table
batches = [1, 4]
seeds = 5                       # --seeds with the command takes more or fewer
get = "git clone ..."           # how to get data that are not there; only for a folder
[base]                          # fields of every run, as of anybatch train
data = "fashion-mnist"
epochs = 3
[vary]                          # fields of which every combination is a comparison with a reference of its own
lr = [0.03, 0.1, 0.3]
[figure]
x = "lr"                        # "batch", a varied field, or an option of the methods
panels = "batch"                # a panel each: "method", "batch" or a varied field; left out: one for all
y = "score"                     # or "difference", to the reference
floor = 60.0                    # the lowest value on the axis; what is below is written there

reading -> planning -> layout (what stands where) -> figure and page; show is the terminal's, checking runs rows anew.
"""
