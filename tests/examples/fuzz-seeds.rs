//! Writes the seeds of all fuzz targets to `fuzz-corpus/`: `cargo run -p cloison-tests --example fuzz-seeds`.

#![forbid(unsafe_code)]

use cloison_tests::seeds::Target;

fn main() -> anyhow::Result<()> {
    for target in Target::ALL {
        println!("{}: {} seeds", target.name(), target.write()?);
    }
    Ok(())
}
