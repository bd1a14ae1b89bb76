from resflax.config import base, ConfigError
def get_config(dataset="digits"):
    if dataset!='digits': raise ConfigError("no dataset")
    c=base()
    c.train.epochs=2.
    return c
