from ds_loader.dataloader import *
