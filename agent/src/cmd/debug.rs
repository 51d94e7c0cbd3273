//! `debug bundle`: what somebody who helps needs to see, in one file.

use super::{Done, Failure, print_text};
use crate::args::{Bundle, Debug};
use crate::bundle::{self, contents};
use crate::config::Config;

/// Makes what is asked for.
///
/// # Errors
/// [`Failure`].
pub fn run(config: &Config, args: &Debug) -> Result<Done, Failure> {
    match args {
        Debug::Bundle(args) => bundle(config, args),
    }
}

fn bundle(config: &Config, args: &Bundle) -> Result<Done, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Other {
            what: "only root can look at all of this".into(),
            hint: "run the command with sudo".into(),
        });
    }
    let entries = contents::entries(config);
    let written = bundle::write(&args.to, &entries, &contents::redactor(config));
    let taken_out = written.map_err(|error| Failure::Other {
        what: format!("cannot write {}: {error}", args.to.display()),
        hint: "name a new file in a directory that you may write to".into(),
    })?;
    let redacted = match taken_out {
        0 => String::new(),
        count => format!(" {count} secrets that had got into a text were taken out."),
    };
    print_text(&format!(
        "{} files in {}, readable by its owner alone.{redacted}\n\nIt holds no key, token or credential, but the names and addresses of this host's peers.",
        entries.len(),
        args.to.display()
    ))?;
    Ok(Done::Well)
}
