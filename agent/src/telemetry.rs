//! What the agent says: where its log lines go. What was denied is summed up in [`crate::denials`].

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, LogFormat};

/// Starts logging to standard error.
///
/// # Errors
/// [`ConfigError::Value`] for a filter that cannot be read.
pub fn start(config: &Config) -> Result<(), ConfigError> {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log.clone());
    // A refused datagram is one more attempt that fails, and that is said once.
    let filter = EnvFilter::try_new(format!("quinn_udp=error,{wanted}")).map_err(|e| ConfigError::Value {
        key: "log",
        message: e.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // A second start in one process keeps the first subscriber: that is what tests want.
    let _ = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}
