"""The same model under the interfaces of other libraries."""
