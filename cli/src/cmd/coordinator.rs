//! `cloison coordinator address`: where hosts find the coordinator.

use std::io::{self, Write};

use cloison_proto::api::{AddressList, AddressRequest};

use super::Context;
use crate::args::{AddressCommand, CoordinatorCommand};
use crate::client::percent_encoded;
use crate::error::{CliError, Exit};
use crate::render::{print, table, utc};

pub(super) async fn run(context: &Context, command: CoordinatorCommand) -> Result<Exit, CliError> {
    let CoordinatorCommand::Address(command) = command;
    let all: AddressList = match command {
        AddressCommand::List => context.client.get("addresses").await?,
        AddressCommand::Add { address } => context.client.post("addresses", &AddressRequest { address }).await?,
        AddressCommand::Remove { address } => {
            let path = format!("addresses/{}", percent_encoded(&address));
            context.client.delete_for(&path).await?
        }
    };
    print(context.output, &all, people)?;
    Ok(Exit::Ok)
}

fn people(out: &mut dyn Write, all: &AddressList) -> io::Result<()> {
    let rows = all.addresses.iter().map(|one| vec![one.address.clone(), utc(one.since)]);
    table(out, &["address", "since"], rows)
}
