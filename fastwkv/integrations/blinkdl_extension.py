"""The one import in front of BlinkDL's training code: nothing is compiled for WKV, and nothing else changes.

In the script that starts the training, above everything that imports the model::

    import fastwkv.integrations.blinkdl_extension

The import calls :func:`fastwkv.integrations.blinkdl.install`.
"""

from fastwkv.integrations.blinkdl import install

install()
