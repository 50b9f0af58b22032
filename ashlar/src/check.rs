//! `ashlar check`: asks running executors whether their engines' books agree. It finds them in the registry, or where it is told; it
//! changes nothing, and requests go on.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ashlar_registry::key;
use ashlar_registry::record::{self, ExecutorRecord};
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_wire::v1::operator_client::OperatorClient;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::config::{Config, PlaceArgs};
use crate::status::Found;
use crate::{output, server, serving};

/// Time for a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for an answer: an executor looks between two batches, and at all that it has.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Which executors to ask; what its help says stands in `main.rs`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: PlaceArgs,
    /// An executor's gRPC address, in place of what the registry knows (repeatable)
    #[arg(long = "executor", value_name = "HOST:PORT", value_parser = address, conflicts_with_all = ["config", "zoo", "registry", "set"])]
    executors: Vec<String>,
}

/// A host and a port, and nothing around them.
fn address(text: &str) -> Result<String, String> {
    let is_address = text.rsplit_once(':').is_some_and(|(host, port)| {
        let port = port.parse().is_ok_and(|port: u16| port > 0) && port.bytes().all(|byte| byte.is_ascii_digit());
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = match bracketed {
            Some(host) => host.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)),
        };
        host && port
    });
    if is_address { Ok(text.to_owned()) } else { Err("use HOST:PORT".to_owned()) }
}

/// An executor to ask.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    /// Who should be there; None where only the address was given.
    id: Option<ExecutorId>,
    address: String,
}

/// Asks, and prints a line for each.
///
/// # Errors
/// A registry out of reach, no executor at all, or one that has a fault or cannot be reached.
pub async fn run(args: CheckArgs) -> anyhow::Result<()> {
    let asked = match args.executors.is_empty() {
        true => registered(&args.config.load()?).await?,
        false => args.executors.into_iter().map(|address| Asked { id: None, address }).collect(),
    };
    let answers = futures::future::join_all(asked.iter().map(ask)).await;
    output::text(asked.iter().zip(&answers).map(|(asked, answer)| line(asked, answer)).collect::<String>())?;
    let unwell = answers.iter().filter(|answer| !answer.as_ref().is_ok_and(|reply| reply.fault.is_empty())).count();
    if unwell == 0 {
        return Ok(());
    }
    let said = format!("find every executor well: {unwell} of {} has a fault or cannot be reached", answers.len());
    let has_fault = answers.iter().any(|answer| answer.as_ref().is_ok_and(|reply| !reply.fault.is_empty()));
    Err(if has_fault { Found(said).into() } else { anyhow::anyhow!(said) })
}

/// The executors that the configured registry knows: at least one.
async fn registered(config: &Config) -> anyhow::Result<Vec<Asked>> {
    let url = &config.registry.url;
    if url == "memory:" {
        bail!(
            "find executors: a registry in memory is known to its own server alone; use --executor with the address that the server's log tells"
        );
    }
    let Some(registry) = serving::registry_file(config)? else {
        let registry = server::open_registry(config, server::Role::Serve).await?;
        let entries = registry.get_prefix(key::EXECUTORS).await.context("read the executors")?;
        ensure!(!entries.is_empty(), "find an executor: none is registered at {url}");
        let records = entries.iter().map(record::parse::<ExecutorRecord>).collect::<Result<Vec<_>, _>>()?;
        return Ok(records.into_iter().map(|record| Asked { id: Some(record.id), address: record.address }).collect());
    };
    let here = serving::told(&registry)?;
    let Some((id, address)) = here else {
        bail!(
            "find an executor: no `ashlar serve` runs on registry {registry}; name the zoo that it serves by --zoo, or its registry by --registry"
        );
    };
    Ok(vec![Asked { id: Some(id), address }])
}

/// What an executor answers, or why it does not.
async fn ask(asked: &Asked) -> anyhow::Result<v1::CheckReply> {
    ensure!(asked.address != server::IN_PROCESS, "it is part of an `ashlar serve`, whose log tells the address for --executor");
    let endpoint = Endpoint::from_shared(format!("http://{}", asked.address)).context("this is no address")?;
    let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(ANSWER_TIMEOUT).connect().await?;
    let reply = OperatorClient::new(channel).check(v1::CheckRequest {}).await;
    let reply = reply.map_err(refusal)?.into_inner();
    if let Some(id) = asked.id.as_ref().filter(|id| id.0 != reply.executor_id) {
        bail!("{} answers there, and {id} has gone", reply.executor_id);
    }
    Ok(reply)
}

/// Why a call has no answer. What our side makes of bytes that are no gRPC says nothing of use.
fn refusal(status: tonic::Status) -> anyhow::Error {
    let own = std::error::Error::source(&status).is_some() && matches!(status.code(), Code::Unknown | Code::Internal | Code::Unavailable);
    match own || status.message().starts_with("grpc-status header missing") {
        true => anyhow::anyhow!("what listens there does not speak gRPC, or broke off; an executor's address is its `executor.listen`"),
        false => anyhow::anyhow!("{}: {}", status.code(), status.message()),
    }
}

fn line(asked: &Asked, answer: &anyhow::Result<v1::CheckReply>) -> String {
    let address = &asked.address;
    match answer {
        Ok(reply) => {
            let verdict = if reply.fault.is_empty() { "ok".to_owned() } else { format!("fault: {}", reply.fault) };
            let v1::CheckReply { executor_id, used_pages, cached_pages, free_pages, .. } = reply;
            format!("{executor_id}  {address}  {verdict}  pages: {used_pages} used, {cached_pages} cached, {free_pages} free\n")
        }
        Err(error) => {
            let id = asked.id.as_ref().map_or("?", |id| id.0.as_str());
            format!("{id}  {address}  cannot be reached: {error:#}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: Option<&str>, address: &str) -> Asked {
        Asked { id: id.map(|id| ExecutorId(id.to_owned())), address: address.to_owned() }
    }

    #[test]
    fn a_line_tells_who_is_well_who_has_a_fault_and_who_is_not_there() {
        let reply = |fault: &str| {
            let (executor_id, fault) = ("exe_a".to_owned(), fault.to_owned());
            Ok(v1::CheckReply { executor_id, fault, used_pages: 1, cached_pages: 20, free_pages: 300 })
        };
        let pages = "pages: 1 used, 20 cached, 300 free\n";
        let asked = at(None, "10.0.0.1:8090");
        assert_eq!(line(&asked, &reply("")), format!("exe_a  10.0.0.1:8090  ok  {pages}"));
        let fault = "handle 3 is in 2 of held, free, cached";
        assert_eq!(line(&asked, &reply(fault)), format!("exe_a  10.0.0.1:8090  fault: {fault}  {pages}"));
        let nobody = || Err(anyhow::anyhow!("no route"));
        assert_eq!(line(&asked, &nobody()), "?  10.0.0.1:8090  cannot be reached: no route\n");
        assert_eq!(line(&at(Some("exe_b"), "10.0.0.1:8090"), &nobody()), "exe_b  10.0.0.1:8090  cannot be reached: no route\n");
    }

    #[tokio::test]
    async fn who_cannot_be_asked_says_why() {
        let why = async |asked: Asked| format!("{:#}", ask(&asked).await.unwrap_err());
        // Bound and not listened to by anybody once it is dropped.
        let address = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert!(why(at(None, &address.to_string())).await.contains("refused"));
        assert!(why(at(None, "no address")).await.contains("this is no address"));
        assert!(why(at(Some("exe_a"), server::IN_PROCESS)).await.contains("ashlar serve"));
        // A server that answers in HTTP/1.1, as a router does.
        let http = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = http.local_addr().unwrap();
        let answer = async {
            let (mut stream, _) = http.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            stream
        };
        let (_stream, why) = tokio::join!(answer, why(at(None, &address.to_string())));
        assert!(why.contains("does not speak gRPC"), "{why}");
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for good in ["127.0.0.1:8090", "exe-1.pool_a.svc:8090", "[::1]:8090"] {
            assert_eq!(address(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "host",
            "host:",
            ":8090",
            "host:0",
            "host:65536",
            "host:+80",
            "host:http",
            "http://host:80",
            "host:80/",
            "host:80/x",
            "a@host:80",
            "::1:8090",
            "[host]:80",
            "host :80",
            "host:80?x",
            "host:80 ",
        ] {
            assert_eq!(address(bad), Err("use HOST:PORT".to_owned()), "{bad}");
        }
    }
}
