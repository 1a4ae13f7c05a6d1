"""Small models with another library's quantiser (`before`) and with ours: docs/migration.md shows what changes."""
