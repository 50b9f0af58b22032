//! The one JSON text that a value has in the zoo: sorted keys, no white space, floats in shortest form. Digests are
//! taken over these bytes, so equal values are one object.

use serde::Serialize;
use serde_json::Value;

/// Serialises `value` canonically.
///
/// # Panics
/// When `value` cannot be JSON (a map with keys that are no strings, or a number that is not finite): manifests have none.
pub fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    // By way of text, not of `to_value`: an f32 keeps its own shortest digits in text and would be widened in a Value.
    let text = serde_json::to_string(value).expect("manifest types have string keys and finite numbers");
    let mut value: Value = serde_json::from_str(&text).expect("what serde_json wrote it can read");
    sort(&mut value);
    serde_json::to_vec(&value).expect("a Value is always JSON")
}

/// The digest of a value: of the one text that it has.
pub fn digest<T: Serialize>(value: &T) -> crate::digest::Digest {
    crate::digest::Digest::of(&to_bytes(value))
}

fn sort(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(sort),
        Value::Object(map) => {
            map.sort_keys();
            map.values_mut().for_each(sort);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn keys_are_sorted_at_every_depth_and_floats_are_shortest() {
        #[derive(serde::Serialize)]
        struct Sample {
            b: f32,
            a: serde_json::Value,
        }
        let sample = Sample { b: 1e-5, a: json!({"z": 0.1, "y": [{"d": 1, "c": null}]}) };
        let text = String::from_utf8(super::to_bytes(&sample)).unwrap();
        assert_eq!(text, r#"{"a":{"y":[{"c":null,"d":1}],"z":0.1},"b":0.00001}"#);
    }
}
