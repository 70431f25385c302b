//! A volume with a lost member: it runs, and everything that was acknowledged is served, whichever member it is and
//! whenever it was lost.

use std::fs::File;
use tests::clients::{Broker, Logs, client, orderly, serve, text};
use tests::process::{Sandbox, Server, assert_refusal, bytes_of, free_port, succeed};

fn status(sandbox: &Sandbox, member: &std::path::Path) -> serde_json::Value {
    let told = succeed(sandbox.raid10().arg("status").arg(member).arg("--json"));
    serde_json::from_str(&told).expect("status --json prints JSON")
}

fn states(status: &serde_json::Value) -> Vec<&str> {
    let members = status["members"].as_array().unwrap_or_else(|| panic!("{status}"));
    members.iter().map(|member| member["state"].as_str().unwrap_or("?")).collect()
}

fn produce(sandbox: &Sandbox, broker: &Broker, topic: &str) {
    // Acknowledged by all live legs, and no codec: the records' bytes lie on the members as they are.
    let mut command = broker.kcat(sandbox, &format!("-P -t {topic} -X acks=all -l"));
    client(command.arg(sandbox.join("text")));
}

fn assert_consumed(sandbox: &Sandbox, broker: &Broker, topic: &str) {
    let got = client(&mut broker.kcat(sandbox, &format!("-C -t {topic} -p 0 -o beginning -e -q")));
    assert!(got.as_bytes() == bytes_of(&sandbox.join("text")), "{topic}: {} bytes, not the text", got.len());
}

/// Whichever image is deleted while the broker is stopped: it starts again with the same command line, says that it
/// is degraded, serves all data, takes more, and goes on so after another restart and a kill.
#[test]
fn any_one_image_deleted_before_start() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    text(&sandbox.join("text"), 60_000);
    let broker = Broker::start(&sandbox, &[]);
    produce(&sandbox, &broker, "before");
    broker.stop();
    let images = sandbox.images(4);
    let kept = sandbox.join("kept");
    std::fs::create_dir(&kept).expect("the sandbox can be written");
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        succeed(sandbox.command("cp").args(["-a", "--sparse=always"]).arg(from).arg(to));
    };
    for image in &images {
        copy(image, &kept);
    }

    for lost in 0..4 {
        for image in &images {
            copy(&kept.join(image.file_name().expect("an image has a name")), image);
        }
        std::fs::remove_file(&images[lost]).expect("it is there");
        let broker = Broker::start(&sandbox, &[]);
        let present = &images[(lost + 1) % 4];
        let told = status(&sandbox, present);
        assert_eq!(told["state"], "degraded", "{told}");
        let expected: Vec<&str> =
            (0..4).map(|slot| if slot == lost { "missing" } else { "in_sync" }).collect();
        assert_eq!(states(&told), expected, "{told}");
        assert_consumed(&sandbox, &broker, "before");
        produce(&sandbox, &broker, "after");
        assert_consumed(&sandbox, &broker, "after");
        let broker = broker.restarted(&sandbox, orderly);
        assert_consumed(&sandbox, &broker, "after");
        let broker = broker.restarted(&sandbox, Server::kill);
        assert_consumed(&sandbox, &broker, "before");
        assert_consumed(&sandbox, &broker, "after");
        broker.stop();
        assert!(!images[lost].exists(), "the lost image was made anew: its slot would look alive");
    }
}

/// A member that loses its bytes under a running broker: reads fail over to the other leg, writes go on.
#[test]
fn an_image_truncated_while_it_serves() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    text(&sandbox.join("text"), 100_000);
    let broker = Broker::start(&sandbox, &[]);
    produce(&sandbox, &broker, "before");
    let images = sandbox.images(4);
    File::options().write(true).open(&images[1]).and_then(|file| file.set_len(0)).expect("the image is ours");
    assert_consumed(&sandbox, &broker, "before");
    produce(&sandbox, &broker, "after");
    assert_consumed(&sandbox, &broker, "after");
    assert_consumed(&sandbox, &broker, "before");
    broker.stop();
    // The empty file is no member any more, and the next start says so; without it the rest is the array, degraded.
    let logs = Logs::Volume(images.clone(), "1G");
    let refused = Server::start_refused(&mut serve(&sandbox, &logs, &[], free_port()));
    assert_refusal("an empty member", &refused, 1);
    assert!(refused.stderr.contains("disk1.img"), "{}", refused.stderr);
    std::fs::remove_file(&images[1]).expect("it is there");
    let broker = Broker::start(&sandbox, &[]);
    assert_consumed(&sandbox, &broker, "before");
    assert_consumed(&sandbox, &broker, "after");
    let told = status(&sandbox, &images[0]);
    assert_eq!(told["state"], "degraded", "{told}");
    broker.stop();
}

/// A member deleted under a running broker is still held open: nothing is noticed until the next start, which is
/// degraded.
#[test]
fn an_image_deleted_while_it_serves() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    text(&sandbox.join("text"), 20_000);
    let broker = Broker::start(&sandbox, &[]);
    produce(&sandbox, &broker, "before");
    let images = sandbox.images(4);
    std::fs::remove_file(&images[3]).expect("it is there");
    produce(&sandbox, &broker, "after");
    assert_consumed(&sandbox, &broker, "before");
    let broker = broker.restarted(&sandbox, Server::kill);
    assert_consumed(&sandbox, &broker, "before");
    assert_consumed(&sandbox, &broker, "after");
    assert_eq!(status(&sandbox, &images[0])["state"], "degraded");
    broker.stop();
}
