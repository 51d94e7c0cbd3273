//! `cloison login`: tries the credential, then writes the configuration.

use std::path::Path;

use cloison_proto::api::MeshStatus;
use zeroize::Zeroizing;

use super::read_text;
use crate::args::LoginArgs;
use crate::client::Client;
use crate::config::Config;
use crate::error::{CliError, Exit};

pub(super) async fn run(args: &LoginArgs, path: &Path) -> Result<Exit, CliError> {
    let credential = Zeroizing::new(read_text(args.credential_file.as_deref().unwrap_or(Path::new("-")))?);
    let config = Config {
        url: args.url.clone(),
        root_certificate: read_text(&args.root_certificate)?,
        credential: credential.trim().to_owned(),
    };
    let status: MeshStatus = Client::new(&config)?.get("status").await?;
    config.save(path)?;
    anstream::println!("logged in to {} with {} hosts; wrote {}", status.mesh, status.hosts, path.display());
    Ok(Exit::Ok)
}
